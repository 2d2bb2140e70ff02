"""The network: what a checkpoint knows (configuration), observations to tensors (processing), tensors to logits
(modeling), where weights come from (backbones), adapters (lora). It does not know datasets or environments."""
