"""Decoding: a prefix becomes the tokens of one action chunk. It does not know robots or what tokens mean."""
