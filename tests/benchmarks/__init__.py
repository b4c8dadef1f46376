"""`make bench`: speed, memory and size compared with the plain forward pass or the usual way. No assertions."""
