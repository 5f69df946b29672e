"""The fields of a run and of its SAEs: dataclasses, presets and checks that need no torch."""
