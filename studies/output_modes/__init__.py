"""What becomes of a language model whose output layer was full, frozen or restricted while it was fine-tuned.

`grid` says which runs there are, `texts` and `pretrained` what they read and start from, `runs` is one fine-tuning,
`measures` what is measured on the merged model, `files` what lies in the results folder, `plots` and `tables` show it.
"""
