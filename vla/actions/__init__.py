"""Pure transforms between robot actions and action tokens: normalisation, then discretisation. No models, no files."""
