"""For authors of plug-ins: small hosts to try a part on, and the checks that it should pass."""

from adaptok.testing.models import make_vit

__all__ = ["make_vit"]
