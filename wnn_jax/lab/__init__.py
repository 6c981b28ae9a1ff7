"""The laboratory: make nowcasters, and compare methods of training."""
