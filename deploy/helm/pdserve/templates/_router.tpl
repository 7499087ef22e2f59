{{- /* Joins Ray as a node that offers nothing, since only a node can start and own actors. */}}
{{- define "pdserve.routerScript" -}}
set -eu
{{- if .Values.ray.enabled }}
ray start --address={{ include "pdserve.headAddress" . }} --num-cpus=0 --num-gpus=0 \
{{- range $name, $value := (include "pdserve.rayPorts" . | fromYaml) }}
  {{ if eq $name "disable-usage-stats" }}--disable-usage-stats{{ else }}--{{ $name }}={{ $value }}{{ end }} \
{{- end }}
  --include-log-monitor=false
{{- end }}
exec pdserve up --config /etc/pdserve/config/pdserve.yaml
{{- end }}

{{- define "pdserve.httpProbe" -}}
httpGet:
  path: {{ .path }}
  port: http
  scheme: {{ ternary "HTTPS" "HTTP" (not (empty .root.Values.security.tlsSecret)) }}
{{- end }}

{{- define "pdserve.routerProbes" -}}
startupProbe:
  {{- include "pdserve.httpProbe" (dict "root" . "path" "/health") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div .Values.routerSpec.startupSeconds 5 }}
livenessProbe:
  {{- include "pdserve.httpProbe" (dict "root" . "path" "/health") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  {{- include "pdserve.httpProbe" (dict "root" . "path" "/ready") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}

{{- define "pdserve.waitForRay" -}}
{{- if .Values.ray.enabled }}
- name: wait-for-ray
  image: {{ include "pdserve.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [/bin/sh, -c]
  args: ["until ray health-check --address {{ include "pdserve.headAddress" . }} 2>/dev/null; do echo waiting for Ray; sleep 2; done"]
  env:
    {{- include "pdserve.rayEnv" . | nindent 4 }}
  securityContext:
    {{- include "pdserve.containerSecurity" . | nindent 4 }}
  resources:
    requests: {cpu: 50m, memory: 256Mi}
    limits: {cpu: 500m, memory: 512Mi}
  volumeMounts:
    - name: tmp
      mountPath: /tmp
    - name: home
      mountPath: /var/lib/pdserve
{{- end }}
{{- end }}

{{- define "pdserve.checkAdmin" -}}
{{- if .Values.admin.enabled }}
{{- if not .Values.security.internalTlsSecret }}
{{- fail "admin.enabled needs security.internalTlsSecret: the admin service takes callers over mutual TLS alone" }}
{{- end }}
{{- if or .Values.autoscaling.enabled (ne (int .Values.routerSpec.replicaCount) 1) }}
{{- fail "admin.enabled needs one router: with more, each is a cluster of its own behind one Service" }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What callers of the fronts need: keys and the certificate. */}}
{{- define "pdserve.frontMounts" -}}
{{- if .Values.security.apiKeysSecret }}
- name: api-keys
  mountPath: /etc/pdserve/api-keys
  readOnly: true
{{- end }}
{{- if .Values.security.tlsSecret }}
- name: tls
  mountPath: /etc/pdserve/tls
  readOnly: true
{{- end }}
{{- end }}

{{- define "pdserve.frontVolumes" -}}
{{- if .Values.security.apiKeysSecret }}
- name: api-keys
  secret:
    secretName: {{ .Values.security.apiKeysSecret }}
    defaultMode: 0440
    items:
      - {key: api-keys, path: api-keys}
{{- end }}
{{- end }}
