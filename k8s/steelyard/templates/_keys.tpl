{{/*
A new API key, (dict "name" ... "scopes" (list ...)), as JSON: its token, and the record of keys.json that knows the
token's hash. serving/gateway/keys.py reads it.
*/}}
{{- define "steelyard.newKey" -}}
{{- $id := randAlphaNum 32 | sha256sum | trunc 8 -}}
{{- $token := printf "sk-steelyard-%s-%s" $id (randAlphaNum 43) -}}
{{- $record := dict "id" $id "name" .name "scopes" .scopes "created_at" (include "steelyard.now" .) "expires_at" nil "revoked_at" nil "sha256" (sha256sum $token) -}}
{{- toJson (dict "token" $token "record" $record) -}}
{{- end -}}

{{- define "steelyard.now" -}}
{{- dateInZone "2006-01-02T15:04:05Z" now "UTC" -}}
{{- end -}}

{{/*
(dict "data" ... "entry" ... "name" ...): the Secret's data with a token under `entry` that opens the metrics and nothing
else. One that is there stays; one that is unknown, revoked, expired or opens more gets a successor, so that to rotate it
is to revoke it and to upgrade.
*/}}
{{- define "steelyard.withMetricsKey" -}}
{{- $keys := index .data "keys.json" | b64dec | fromJson -}}
{{- if not (kindIs "slice" $keys.keys) -}}{{- fail (printf "keys.json of the Secret %s is damaged: restore it before monitoring.enabled adds a key" .name) -}}{{- end -}}
{{- $hash := default "" (index .data .entry) | b64dec | sha256sum -}}
{{- $now := include "steelyard.now" . -}}
{{- $good := false -}}
{{- range $keys.keys -}}
{{- if and (eq .sha256 $hash) (not .revoked_at) (or (not .expires_at) (gt .expires_at $now)) (eq (toJson .scopes) `["metrics"]`) -}}{{- $good = true -}}{{- end -}}
{{- end -}}
{{- $data := deepCopy .data -}}
{{- if not $good -}}
{{- $new := include "steelyard.newKey" (dict "name" "prometheus" "scopes" (list "metrics")) | fromJson -}}
{{- $_ := set $keys "keys" (append $keys.keys $new.record) -}}
{{- $_ := set $data "keys.json" (toJson $keys | b64enc) -}}
{{- $_ := set $data .entry (b64enc $new.token) -}}
{{- end -}}
{{- toJson $data -}}
{{- end -}}
