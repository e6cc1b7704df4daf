"""Ranks: how much compensator each matrix gets, by policies, by measured spectra, or within a byte budget."""
