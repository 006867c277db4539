"""Adapters of the families of hosts that `adaptok.wrap` knows; one file each."""
