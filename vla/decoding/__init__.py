"""Decoding: from a prompt prefix to the tokens of an action chunk. It does not know robots or the meaning of tokens."""
