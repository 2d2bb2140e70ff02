"""The network: the checkpoint's configuration, conversion of observations to tensors, the model, its construction from
sources of weights, and LoRA. It does not know datasets or environments."""
