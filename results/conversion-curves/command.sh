# Commit a422687; stopped after 386 of 840 stages. learning_curve records are left out of results.jsonl.
python launch.py --config=configs/sweeps/conversion.py --jobs=2
