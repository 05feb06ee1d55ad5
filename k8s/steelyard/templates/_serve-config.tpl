{{/*
The Serve config, as JSON: the counterpart of serving/fleet/manifest.py. What is constant there comes from there, by
files/catalog.json; a test compares the whole with `steelyard render`.
*/}}
{{- define "steelyard.serveConfig" -}}
{{- $known := .Files.Get "files/catalog.json" | fromJson -}}
{{- $catalog := include "steelyard.catalog" . | fromJson -}}
{{- $gateways := int .Values.gateways -}}
{{- $drain := 0.0 -}}
{{- $names := dict -}}
{{- $models := list -}}
{{- $apps := list -}}
{{- range $model := $catalog.models -}}
{{- $ids := list -}}
{{- $required := list -}}
{{- $stable := dict -}}
{{- range $version := $model.versions -}}
{{- $id := printf "%s@%s" $model.name $version.version -}}
{{- $drain = maxf $drain $version.drain_s -}}
{{- $ids = append $ids $version.version -}}
{{- if gt (int $version.scaling.min) 0 -}}{{- $required = append $required $version.version -}}{{- end -}}
{{- if eq $version.version $model.stable -}}{{- $stable = $version -}}{{- end -}}
{{- $options := dict "num_cpus" $version.resources.cpus -}}
{{- if $version.resources.gpus -}}{{- $_ := set $options "num_gpus" $version.resources.gpus -}}{{- end -}}
{{- if $version.resources.accelerator -}}{{- $_ := set $options "accelerator_type" $version.resources.accelerator -}}{{- end -}}
{{- if $model.labels -}}{{- $_ := set $options "label_selector" $model.labels -}}{{- end -}}
{{- $app := deepCopy $known.engineApp -}}
{{- $_ := set $app "name" $id -}}
{{- $_ := set $app "args" (dict
    "model" $model.name "version" $version.version "kind" $version.engine.kind "weights" $version.weights
    "served_names" (list $model.name $id) "args" $version.engine.args "env" $version.engine.env "adapters" $version.adapters) -}}
{{- $deployment := index $app.deployments 0 -}}
{{- $slots := $known.slots -}}
{{- if hasKey $version.engine.args "max-num-seqs" -}}
{{- $given := toString (index $version.engine.args "max-num-seqs") -}}
{{- if regexMatch "^[0-9]+$" $given -}}{{- $slots = int $given -}}{{- end -}}
{{- end -}}
{{- $scaling := $deployment.autoscaling_config -}}
{{- $_ := set $scaling "min_replicas" $version.scaling.min -}}
{{- $_ := set $scaling "max_replicas" $version.scaling.max -}}
{{- $_ := set $scaling "target_ongoing_requests" (default (max 1 (div (mul $slots 3) 4)) $version.scaling.target_ongoing) -}}
{{- $_ := set $scaling "downscale_delay_s" $version.scaling.scale_down_after_s -}}
{{- if ne $version.scaling.idle_to_zero_s nil -}}
{{- $_ := set $scaling "downscale_to_zero_delay_s" $version.scaling.idle_to_zero_s -}}
{{- end -}}
{{- $config := dict "start_timeout_s" $version.start_timeout_s "drain_s" $version.drain_s "stuck_timeout_s" $version.stuck_timeout_s -}}
{{- if hasKey $deployment.user_config "builds" -}}
{{- $builds := list -}}
{{- range $version.builds -}}{{- $builds = append $builds (dict "source" . "base" $known.recipesDir) -}}{{- end -}}
{{- $_ := set $config "builds" $builds -}}
{{- end -}}
{{- $schedule := list -}}
{{- range $version.scaling.schedule -}}{{- $schedule = append $schedule (set (deepCopy .) "timezone" (default "UTC" .timezone)) -}}{{- end -}}
{{- $_ := set $config "schedule" $schedule -}}
{{- $_ := set $deployment "user_config" $config -}}
{{- $_ := set $deployment "graceful_shutdown_timeout_s" (addf $version.drain_s $known.stopGraceSeconds) -}}
{{- $_ := set $deployment "ray_actor_options" $options -}}
{{- $_ := set $app "deployments" (list $deployment) -}}
{{- $apps = append $apps $app -}}
{{- end -}}
{{- range $version := append $model.versions $stable -}}
{{- $to := dict "model" $model.name "version" $version.version -}}
{{- $_ := set $names (printf "%s@%s" $model.name $version.version) $to -}}
{{- $_ := set $names $model.name $to -}}
{{- range $adapter := $version.adapters -}}
{{- $to := dict "model" $model.name "version" $version.version "adapter" $adapter.name -}}
{{- $_ := set $names $adapter.name $to -}}
{{- $_ := set $names (printf "%s@%s" $adapter.name $version.version) (set (deepCopy $to) "sent_as" $adapter.name) -}}
{{- end -}}
{{- end -}}
{{- $models = append $models (dict
    "name" $model.name "versions" $ids "required" $required "allow" $model.allow
    "limits" $model.limits "slo" $model.slo) -}}
{{- end -}}
{{- $gateway := deepCopy $known.gatewayApp -}}
{{- $deployment := index $gateway.deployments 0 -}}
{{- $_ := set $deployment "num_replicas" (mul $gateways (include "steelyard.nodes" . | int)) -}}
{{- $_ := set $deployment "max_replicas_per_node" $gateways -}}
{{- $_ := set $deployment "user_config" (dict "models" $models "names" $names "drain_s" $drain) -}}
{{- $_ := set $deployment "graceful_shutdown_timeout_s" (addf $drain $known.stopGraceSeconds) -}}
{{- $_ := set $gateway "deployments" (list $deployment) -}}
{{- toJson (set (deepCopy $known.config) "applications" (prepend $apps $gateway)) -}}
{{- end -}}
