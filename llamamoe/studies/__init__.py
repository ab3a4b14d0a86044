"""Studies: measure many conversions of one model under the same conditions."""
