"""Fine-tuning data: rows of text into samples whose completions alone have a loss, one or several in a sequence."""
