"""How many cases a property is tried on: some in the quick tier, all in the slow one."""

from hypothesis import settings

QUICK, THOROUGH = "quick", "thorough"

settings.register_profile(QUICK, deadline=None)
settings.register_profile(THOROUGH, deadline=None)


def cases(thorough: int, *, quick: int) -> settings:
    """The settings of a property, by the tier that is being run: conftest.py chooses the profile before tests are read."""
    chosen = settings.get_current_profile_name()
    return settings(max_examples=thorough if chosen == THOROUGH else quick, deadline=None)
