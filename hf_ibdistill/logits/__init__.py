"""How logits are stored in columns, and the provenance that travels with them."""
