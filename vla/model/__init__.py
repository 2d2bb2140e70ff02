"""The network: checkpoint configuration (configuration), observations to tensors (processing), tensors to logits
(modeling), construction (build), sources of weights (sources) and adapters (lora). No datasets or environments."""
