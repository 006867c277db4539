"""Peak of the memory that tensors hold: moved into the library, kept here for the scripts."""

from adaptok.measure.memory import LiveMemory

__all__ = ["LiveMemory"]
