"""The networks: image encoders, lifting, BEV decoder and heads."""
