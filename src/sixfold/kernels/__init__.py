"""Operations on tensors: one folder each, with a plain-PyTorch reference and faster backends."""
