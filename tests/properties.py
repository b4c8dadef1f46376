"""The number of cases of property tests: some in the quick tier, all in the exhaustive one."""

from hypothesis import settings

QUICK, THOROUGH = "quick", "thorough"

settings.register_profile(QUICK, deadline=None)
settings.register_profile(THOROUGH, deadline=None)


def cases(thorough: int, *, quick: int) -> settings:
    """Settings with the number of cases of the current tier, whose profile conftest.py loads before collection."""
    chosen = settings.get_current_profile_name()
    return settings(max_examples=thorough if chosen == THOROUGH else quick, deadline=None)
