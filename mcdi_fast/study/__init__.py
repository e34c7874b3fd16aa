"""The comparison of methods, `python -m mcdi_fast.study`. It uses public names of the package; nothing imports it."""
