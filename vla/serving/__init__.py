"""Policies over the network: the server (`vla serve`), its wire protocols, and the client."""
