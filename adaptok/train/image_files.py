"""The image files below a folder, also behind links."""

import os
from pathlib import Path

IMAGE_ENDINGS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


def is_image_file(file: Path) -> bool:
    """Say whether a path is called like an image; a link to nothing is one, which cannot be read.

    Args:
        file: the path.
    """
    hidden = file.name.startswith(".")
    return not hidden and file.suffix.lower() in IMAGE_ENDINGS and not file.is_dir()


def list_image_files(folder: Path) -> list[Path]:
    """Return the images in any depth below a folder, in the order of their paths.

    Folders behind links are looked into, each once, so that a link to a folder above ends.

    Args:
        folder: where.

    Returns:
        Their paths.

    Raises:
        OSError: a folder cannot be listed.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> (place / "a.png").touch()
        >>> (place / "again").symlink_to(place)
        >>> [file.name for file in list_image_files(place)]
        ['a.png']
    """
    found: list[Path] = []
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [file for file in (Path(place, name) for name in names) if is_image_file(file)]
    return sorted(found)
