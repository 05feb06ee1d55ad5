{{- define "steelyard.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full -}}
{{- $full = ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- end -}}
{{- if or (gt (len $full) 47) (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full)) -}}
{{- fail (printf "the name %q cannot name a RayService: at most 47 of a-z, 0-9 and '-', first a letter; set fullnameOverride" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{/* Labels that select: they must not change over the life of a release, nor with the chart's version. */}}
{{- define "steelyard.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "steelyard.labels" -}}
{{ include "steelyard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "steelyard.image" -}}
{{- if not .Values.image.repository -}}
{{- fail "image.repository is empty: build the image of deploy/docker/Dockerfile, push it, and name it here" -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{- $flavour := ternary "cuda" "cpu" (eq .Values.profile "gpu") -}}
{{ .Values.image.repository }}:{{ default (printf "%s-%s" .Chart.AppVersion $flavour) .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "steelyard.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "steelyard.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ required "serviceAccount.name is empty: name the one to use, or set serviceAccount.create" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "steelyard.secret" -}}
{{ default (include "steelyard.fullname" .) .Values.secrets.existingSecret }}
{{- end -}}

{{- define "steelyard.metricsAuthorization" -}}
credentials:
  name: {{ default (include "steelyard.secret" .) .Values.monitoring.existingSecret }}
  key: {{ .Values.monitoring.key }}
{{- end -}}

{{/* Ray nodes that run gateways: the head and every worker. */}}
{{- define "steelyard.nodes" -}}
{{- $nodes := 1 -}}
{{- range .Values.workers -}}{{- $nodes = add $nodes (int .replicas) -}}{{- end -}}
{{- $nodes -}}
{{- end -}}
