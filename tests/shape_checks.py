"""The checker of shape annotations: `pytest --jaxtyping-packages=adaptok...,shape_checks.check`."""

from beartype import BeartypeConf, beartype

# a whole number is a fine fraction, as for every other Python function
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
