"""Record the logits of teachers, attach published ones, verify and assess them."""
