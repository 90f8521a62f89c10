"""`mogeo evaluate`: let models answer, have the answers judged, and estimate net win rates. Knows no training."""
