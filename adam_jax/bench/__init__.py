"""This library beside its peers: `python -m adam_jax bench --help` says what is compared."""
