{{/*
The catalog with every default filled in, for the profile, as JSON: {"models": [...]}. The counterpart of
serving/catalog/{spec,store}.py; its defaults come from them, by files/catalog.json. Types and names are the schema's
business; what concerns more than one key is refused here.
*/}}
{{- define "steelyard.catalog" -}}
{{- $root := . -}}
{{- $known := .Files.Get "files/catalog.json" | fromJson -}}
{{- $profile := .Values.profile -}}
{{- if not .Values.models -}}{{- fail "models is empty: give at least one model (steelyard chart-values --models DIR prints a folder of model files in this form)" -}}{{- end -}}
{{- $names := dict -}}
{{- $models := list -}}
{{- range $model := .Values.models -}}
{{- if hasKey $names $model.name -}}{{- fail (printf "models: the name %q is there twice: model and adapter names are unique" $model.name) -}}{{- end -}}
{{- $_ := set $names $model.name $model.name -}}
{{- $versions := list -}}
{{- $ids := list -}}
{{- range $given := $model.versions -}}
{{- $where := printf "%s@%s" $model.name $given.version -}}
{{- if has $given.version $ids -}}{{- fail (printf "models: %s is listed twice" $where) -}}{{- end -}}
{{- $ids = append $ids $given.version -}}
{{- $version := include "steelyard.with" (list $known.version $given) | fromJson -}}
{{- $engine := include "steelyard.with" (list $known.engine (default dict $given.engine)) | fromJson -}}
{{- $resources := include "steelyard.with" (list $known.resources (default dict $given.resources)) | fromJson -}}
{{- $scaling := include "steelyard.with" (list $known.scaling (default dict $given.scaling)) | fromJson -}}
{{- if and (not $given.weights) (eq $engine.kind "vllm") -}}{{- fail (printf "models: %s has no weights (only the simulator runs without)" $where) -}}{{- end -}}
{{- if lt (int $scaling.max) (int $scaling.min) -}}
{{- fail (printf "models: %s: scaling.min is %d and scaling.max %d: max is at least min" $where (int $scaling.min) (int $scaling.max)) -}}
{{- end -}}
{{- if and (ne $scaling.idle_to_zero_s nil) (gt (int $scaling.min) 0) -}}
{{- fail (printf "models: %s: scaling.idle_to_zero_s needs min: 0 (min is %d)" $where (int $scaling.min)) -}}
{{- end -}}
{{- range $entry := $scaling.schedule -}}
{{- if gt (int $entry.min) (int $scaling.max) -}}
{{- fail (printf "models: %s: scaling.schedule wants %d replicas and scaling.max is %d: min is at most max" $where (int $entry.min) (int $scaling.max)) -}}
{{- end -}}
{{- end -}}
{{- $world := 1 -}}
{{- range $option := list "tensor-parallel-size" "pipeline-parallel-size" -}}
{{- $size := index $engine.args $option -}}
{{- if and (kindIs "float64" $size) (ge $size 1.0) -}}{{- $world = mul $world (int $size) -}}{{- end -}}
{{- end -}}
{{- if and (gt $world 1) (hasKey (default dict $given.resources) "gpus") (gt (float64 $resources.gpus) 0.0) (lt (float64 $resources.gpus) (float64 $world)) -}}
{{- fail (printf "models: %s: tensor x pipeline parallel size is %d: resources.gpus is at least %d" $where (int $world) (int $world)) -}}
{{- end -}}
{{- if and (gt (float64 $resources.gpus) 1.0) (ne (float64 $resources.gpus) (floor $resources.gpus)) -}}{{- fail (printf "models: %s: above 1, resources.gpus is a whole number" $where) -}}{{- end -}}
{{- if eq (float64 $resources.cpus) 0.0 -}}{{- fail (printf "models: %s: resources.cpus is 0: the engine could land on the head; give it at least 1" $where) -}}{{- end -}}
{{- $weights := "" -}}
{{- $builds := list -}}
{{- if and $given.weights (ne $profile "sim") -}}
{{- $weights = include "steelyard.locate" (dict "root" $root "known" $known "source" $given.weights.source "where" $where) -}}
{{- if hasPrefix "build:" $given.weights.source -}}{{- $builds = append $builds $given.weights.source -}}{{- end -}}
{{- end -}}
{{- $adapters := list -}}
{{- $own := list -}}
{{- range $adapter := $given.adapters -}}
{{- if has $adapter.name $own -}}{{- fail (printf "models: %s: adapter %q is listed twice" $where $adapter.name) -}}{{- end -}}
{{- $own = append $own $adapter.name -}}
{{- if and (hasKey $names $adapter.name) (or (ne (get $names $adapter.name) $model.name) (eq $adapter.name $model.name)) -}}
{{- fail (printf "models: %s: the name %q of its adapter is taken: model and adapter names are unique" $where $adapter.name) -}}
{{- end -}}
{{- $_ := set $names $adapter.name $model.name -}}
{{- $path := include "steelyard.locate" (dict "root" $root "known" $known "source" $adapter.source "where" (printf "%s: adapter %s" $where $adapter.name)) -}}
{{- $adapters = append $adapters (dict "name" $adapter.name "path" $path) -}}
{{- if hasPrefix "build:" $adapter.source -}}{{- $builds = append $builds $adapter.source -}}{{- end -}}
{{- end -}}
{{- if eq $profile "gpu" -}}
{{- if and (eq $engine.kind "vllm") (not (hasKey (default dict $given.resources) "gpus")) -}}{{- $_ := set $resources "gpus" $world -}}{{- end -}}
{{- else -}}
{{- $resources = omit (set $resources "gpus" 0) "accelerator" -}}
{{- end -}}
{{- if and (eq $profile "cpu") (eq $engine.kind "vllm") -}}
{{- $_ := set $engine "args" (include "steelyard.with" (list $known.cpu.args $engine.args) | fromJson) -}}
{{- $threads := dict "OMP_NUM_THREADS" (max 1 (int (divf $resources.cpus $world)) | toString) -}}
{{- $_ := set $engine "env" (include "steelyard.with" (list (merge $threads $known.cpu.env) $engine.env) | fromJson) -}}
{{- end -}}
{{- if and (eq $profile "sim") (eq $engine.kind "vllm") -}}
{{- $kept := dict -}}
{{- range $name, $value := $engine.args -}}{{- if has $name $known.sim.args -}}{{- $_ := set $kept $name $value -}}{{- end -}}{{- end -}}
{{- $engine = dict "kind" "simulator" "args" $kept "env" dict -}}
{{- end -}}
{{- $versions = append $versions (dict
    "version" $given.version "weights" (default $model.name $weights) "engine" $engine "adapters" $adapters "builds" $builds
    "resources" $resources "scaling" $scaling "drain_s" $version.drain_s "start_timeout_s" $version.start_timeout_s
    "stuck_timeout_s" $version.stuck_timeout_s) -}}
{{- end -}}
{{- if not $ids -}}{{- fail (printf "models: %s has no versions" $model.name) -}}{{- end -}}
{{- $stable := (default dict $model.release).stable -}}
{{- if and (not $stable) (gt (len $ids) 1) -}}{{- fail (printf "models: %s has %d versions and no release.stable: say which one its name means" $model.name (len $ids)) -}}{{- end -}}
{{- $stable = default (first $ids) $stable -}}
{{- if not (has $stable $ids) -}}{{- fail (printf "models: %s: release.stable is %q; it names one of the versions: %s" $model.name $stable (join ", " $ids)) -}}{{- end -}}
{{- $models = append $models (dict
    "name" $model.name "versions" $versions "stable" $stable "allow" (default list $model.allow)
    "limits" (include "steelyard.with" (list $known.limits (default dict $model.limits)) | fromJson)
    "slo" (include "steelyard.with" (list $known.slo (default dict $model.slo)) | fromJson)
    "labels" (default dict (default dict $model.placement).labels)) -}}
{{- end -}}
{{- toJson (dict "models" $models) -}}
{{- end -}}

{{/* (defaults, given): given wins, also when it is 0, false or "" (which `merge` would drop). */}}
{{- define "steelyard.with" -}}
{{- $out := deepCopy (index . 0) -}}
{{- range $key, $value := index . 1 -}}{{- $_ := set $out $key $value -}}{{- end -}}
{{- toJson $out -}}
{{- end -}}

{{/* Where the weights of `source` lie in a pod; serving/catalog/weights.py `locate` says the same. */}}
{{- define "steelyard.locate" -}}
{{- $values := .root.Values -}}
{{- if hasPrefix "build:" .source -}}
{{- $parts := regexFindAll "[A-Za-z0-9][A-Za-z0-9._-]*" (trimPrefix "build:" .source) -1 -}}
{{- if not (regexMatch "^build:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$" .source) -}}{{- fail (printf "models: %s: %q is no build source: write build:RECIPE/ARTEFACT" .where .source) -}}{{- end -}}
{{- $recipe := get .known.recipes (first $parts) -}}
{{- if not $recipe -}}{{- fail (printf "models: %s: the image has no recipe %q (it has: %s)" .where (first $parts) (keys .known.recipes | sortAlpha | join ", ")) -}}{{- end -}}
{{- printf "%s/%s/%s" .known.cacheDir $recipe (index $parts 1) -}}
{{- else if regexMatch "^[a-z][a-z0-9+.-]*:" .source -}}
{{- fail (printf "models: %s: %s is no path: weights are read from %s; fill it from weights.existingClaim or weights.objectStore" .where .source $values.weights.mountPath) -}}
{{- else -}}
{{- $path := clean .source -}}
{{- if not (hasPrefix (printf "%s/" (clean $values.weights.mountPath)) $path) -}}
{{- fail (printf "models: %s: %s does not lie below weights.mountPath (%s), so no pod would find it" .where .source $values.weights.mountPath) -}}
{{- end -}}
{{- if and (ne $values.profile "sim") (not $values.weights.existingClaim) (not $values.weights.objectStore.enabled) -}}
{{- fail (printf "models: %s: %s has nowhere to come from: set weights.existingClaim or weights.objectStore" .where .source) -}}
{{- end -}}
{{- $path -}}
{{- end -}}
{{- end -}}
