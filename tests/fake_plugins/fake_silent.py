"""Is announced and implements nothing."""
