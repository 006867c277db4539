"""ToMe and ToMe-SD: similar tokens become one."""
