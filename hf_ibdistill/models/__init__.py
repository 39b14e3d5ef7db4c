"""What `from_pretrained` loads. These files import only torch, transformers and each other, so that a Hub repository can
carry them as remote code."""
