"""Sources of pretrained weights."""
