"""Graph networks on the token grid: a router, and a chunker that contracts edges."""
