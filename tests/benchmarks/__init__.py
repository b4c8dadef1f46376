"""`make bench`: how fast, how large, how small, against doing without or doing it the usual way. Never assertions."""
