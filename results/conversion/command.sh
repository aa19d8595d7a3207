# Three seeds, 840 stages, in several parts (the stage cache): commits a422687, acd75d9. Predictions, replicates
# and learning_curve records are left out of results.jsonl.
python launch.py --config=configs/sweeps/conversion.py --jobs=2
