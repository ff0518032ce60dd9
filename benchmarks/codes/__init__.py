"""Which codes and maps lose least at the same bytes, on models that people run."""
