# Three seeds; commits 1e011f0 and b019935. All commands share one workdir, and so the parents.
# table1.py: 225 stages, 83 min on two cores that had other work, two stages at a time. Of groups.py
# and conversion.py a part was run: 4 and 1 KV heads, and the losses straight after conversion.
# Predictions, replicates and learning_curve records are left out of results.jsonl.
shared="--jobs=2 --config.pretrain.steps=3600 --config.train.on_divergence=rollback"
python launch.py --config=configs/sweeps/table1.py $shared
python launch.py --config=configs/sweeps/groups.py $shared --config.sweep.groups.kv_heads=4, \
    --config.sweep.groups.methods=mean,svd --config.sweep.groups.alphas=0.0,0.05
python launch.py --config=configs/sweeps/groups.py $shared --config.sweep.groups.kv_heads=1, \
    --config.sweep.groups.methods=mean,first,random
python launch.py --config=configs/sweeps/conversion.py $shared --stage=convert
