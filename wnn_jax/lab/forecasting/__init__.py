"""Nowcasters: what each kind is trained to do, its training, and its export."""
