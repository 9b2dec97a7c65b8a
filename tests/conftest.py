"""Settings of every test: eight CPU devices, warnings as errors (in pyproject.toml), names that docstring examples use."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
