"""What reaches a policy or a robot over the network: the servers of a policy, and the live page of a deployment."""
