"""Image classification: fine-tuning (Table 8), and a linear probe (Table 9)."""
