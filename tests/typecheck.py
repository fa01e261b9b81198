"""The checker that jaxtyping runs over every annotated call of the library while the tests run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
