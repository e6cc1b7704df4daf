"""Ranks: how much compensator each matrix gets, by policies, or within a byte budget by part and need."""
