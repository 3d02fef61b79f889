"""How a loss is measured: inputs, time, memory, correctness, and the record that each measurement becomes."""
