"""Errors of the library in the words of the command line: options as a person typed them."""

import re
from collections.abc import Mapping

# What the library calls options that the command line calls otherwise.
ALIASES = {"guidance_scale": "guidance", "num_inference_steps": "steps"}
# Code, calls and quoted words stay as they are.
UNTOUCHED = re.compile(r"`[^`]*`|[\w.]+\([^()]*\)|\"[^\"]*\"|(?<!\w)'[^']*'")
IN_FILE = re.compile(r"in \S+: ")
CONFIG = re.compile(r"^\w+ is not valid: (?=--)")
TOLD_TWICE = re.compile(r"(--[\w-]+)=(\S+) \(\1 \2\)")


def speak_options(message: str, options: Mapping[str, str]) -> str:
    """Write the names of options in an error as a person types them.

    A name in one word is taken for an option only where a value follows, or where it heads a
    problem: `steps=0` and `steps: ...`, but not `the steps of a walk`.

    Args:
        message: what the library says.
        options: the options of the command by their Python names, such as `--uncond-drop`.

    Returns:
        The message; one about a file is left as it is, since its keys have Python names.

    Example:
        >>> options = {"guidance": "--guidance", "ema_decay": "--ema", "steps": "--steps"}
        >>> speak_options("set guidance_scale to 1", options)
        'set --guidance to 1'
        >>> speak_options("TrainConfig is not valid: ema_decay: too large; steps: none", options)
        '--ema: too large; --steps: none'
    """
    if not options or IN_FILE.match(message):
        return message
    aliases = {long: options[name] for long, name in ALIASES.items() if name in options}
    known = aliases | dict(options)
    names = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    heading = re.compile(rf"(^|is not valid: |; )(?:model\.)?({names})(?:\.\d+)*(?=: )")
    inside = re.compile(rf"(?<![\w./,:=-])(?:model\.)?({names})(?![\w/-]|\.\w)(=(?![= ,);]))?")

    def name_inside(found: re.Match[str]) -> str:
        name, sign = found[1], found[2] or ""
        return f"{known[name]}{sign}" if sign or "_" in name else found[0]

    message = heading.sub(lambda found: f"{found[1]}{known[found[2]]}", message)
    parts, end = [], 0
    for span in UNTOUCHED.finditer(message):
        parts += [inside.sub(name_inside, message[end : span.start()]), span[0]]
        end = span.end()
    parts.append(inside.sub(name_inside, message[end:]))
    return TOLD_TWICE.sub(r"\1 \2", CONFIG.sub("", "".join(parts)))
