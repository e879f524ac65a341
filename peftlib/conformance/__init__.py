"""What every method must do, on tiny random backbones of every family, and the record of what each one does."""
