"""Plain transcriptions of published formulas: what the library's methods are measured against."""
