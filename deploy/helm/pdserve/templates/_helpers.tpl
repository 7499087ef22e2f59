{{- define "pdserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- /* At most 40 characters: KubeRay and we append to it. */}}
{{- define "pdserve.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "pdserve.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "pdserve.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "pdserve.selector" -}}
app.kubernetes.io/name: {{ include "pdserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pdserve.labels" -}}
{{ include "pdserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "pdserve.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "pdserve.secretName" -}}
{{ .Values.security.existingSecret | default (printf "%s-internal" (include "pdserve.fullname" .)) }}
{{- end }}

{{- define "pdserve.headAddress" -}}
{{ include "pdserve.fullname" . }}-head-svc:6379
{{- end }}

{{- define "pdserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsGroup }}
fsGroup: {{ .Values.security.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* A port that a process does not choose comes from here, so that a NetworkPolicy can name it. */}}
{{- define "pdserve.portRange" -}}
sysctls:
  - name: net.ipv4.ip_local_port_range
    value: "20000 29999"
{{- end }}

{{- define "pdserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "pdserve.rayEnv" -}}
- name: HOME
  value: /var/lib/pdserve
- name: HF_HOME
  value: /models/hub
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
# Ray's ports run what they are sent, so they demand a token.
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "pdserve.secretName" . }}
      key: ray-token
# While the control plane is away, streams go on; Ray's own processes must too.
- name: RAY_gcs_rpc_server_reconnect_timeout_s
  value: "86400"
{{- with .Values.ray.containerEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "pdserve.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /var/lib/pdserve
- name: shm
  mountPath: /dev/shm
- name: models
  mountPath: /models
  {{- if .Values.model.volume.readOnly }}
  readOnly: true
  {{- end }}
- name: config
  mountPath: /etc/pdserve/config
  readOnly: true
- name: secrets
  mountPath: /etc/pdserve/secrets
  readOnly: true
{{- if .Values.security.internalTlsSecret }}
- name: internal-tls
  mountPath: /etc/pdserve/internal-tls
  readOnly: true
{{- end }}
{{- end }}

{{- /* Call with (dict "root" $ "shmSize" "256Mi"). */}}
{{- define "pdserve.volumes" -}}
{{- $values := .root.Values -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .shmSize }}
- name: models
  {{- if $values.model.volume.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ $values.model.volume.existingClaim }}
    {{- if $values.model.volume.readOnly }}
    readOnly: true
    {{- end }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $values.model.volume.sizeLimit }}
  {{- end }}
- name: config
  configMap:
    name: {{ include "pdserve.fullname" .root }}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      - secret:
          name: {{ include "pdserve.secretName" .root }}
          items:
            - {key: cluster-token, path: cluster-token}
            - {key: hash-key, path: hash-key}
            {{- if and $values.cacheserverSpec.enabled (not $values.cacheserverSpec.externalUrl) }}
            - {key: cache-password, path: cache-password}
            {{- end }}
      {{- if and $values.cacheserverSpec.externalUrl $values.cacheserverSpec.externalSecret.name }}
      - secret:
          name: {{ $values.cacheserverSpec.externalSecret.name }}
          items:
            - {key: {{ $values.cacheserverSpec.externalSecret.key }}, path: cache-password}
      {{- end }}
{{- if $values.security.internalTlsSecret }}
- name: internal-tls
  secret:
    secretName: {{ $values.security.internalTlsSecret }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "pdserve.prefetch" -}}
{{- if and .Values.model.prefetch (not .Values.model.volume.readOnly) }}
- name: model
  image: {{ include "pdserve.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [python, -m, pdserve.engine.fetch, --config, /etc/pdserve/config/pdserve.yaml]
  env:
    - name: HOME
      value: /var/lib/pdserve
    - name: HF_HOME
      value: /models/hub
    {{- if .Values.model.hubTokenSecret.name }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ .Values.model.hubTokenSecret.name }}
          key: {{ .Values.model.hubTokenSecret.key }}
    {{- end }}
  securityContext:
    {{- include "pdserve.containerSecurity" . | nindent 4 }}
  resources:
    requests: {cpu: 500m, memory: 2Gi}
    limits: {cpu: "2", memory: 4Gi}
  volumeMounts:
    {{- include "pdserve.mounts" . | nindent 4 }}
{{- end }}
{{- end }}

{{- /* Fixed ports of every Ray node; the NetworkPolicies name the same. */}}
{{- define "pdserve.rayPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
metrics-export-port: "6383"
dashboard-agent-grpc-port: "6384"
dashboard-agent-listen-port: "6385"
min-worker-port: "10002"
max-worker-port: "10999"
# Ray carries neither tokens nor KV: its object store only has to exist.
object-store-memory: "83886080"
disable-usage-stats: "true"
{{- end }}

{{- /* The raylet speaks the standard health protocol, without a token. */}}
{{- define "pdserve.rayProbes" -}}
startupProbe:
  grpc: {port: 6380}
  periodSeconds: 2
  failureThreshold: 90
livenessProbe:
  grpc: {port: 6380}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: 6380}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}

{{- define "pdserve.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "pdserve.selector" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "pdserve.drainSeconds" -}}
{{- dig "timers" "drain_s" 30 .Values.config | int -}}
{{- end }}

{{- /* Files and addresses that the chart knows, over what config says. */}}
{{- define "pdserve.config" -}}
{{- $v := .Values }}
{{- $pools := $v.routerSpec.localPools }}
{{- if $v.ray.enabled }}
{{- $prefill := mul $v.workerGroups.prefill.replicas $v.workerGroups.prefill.workersPerPod }}
{{- $decode := mul $v.workerGroups.decode.replicas $v.workerGroups.decode.workersPerPod }}
{{- $pools = dict "prefill" $prefill "decode" $decode "mixed" 0 "ray_address" (include "pdserve.headAddress" .) }}
{{- end }}
{{- $redis := dict "mode" "off" }}
{{- if $v.cacheserverSpec.externalUrl }}
{{- $redis = dict "mode" "url" "url" $v.cacheserverSpec.externalUrl }}
{{- if $v.cacheserverSpec.externalSecret.name }}
{{- $_ := set $redis "password_file" "/etc/pdserve/secrets/cache-password" }}
{{- end }}
{{- else if $v.cacheserverSpec.enabled }}
{{- $redis = dict "mode" "url" "url" (printf "redis://%s-cache:6379/0" (include "pdserve.fullname" .)) "password_file" "/etc/pdserve/secrets/cache-password" }}
{{- end }}
{{- $security := dict "cluster_token_file" "/etc/pdserve/secrets/cluster-token" "hash_key_file" "/etc/pdserve/secrets/hash-key" }}
{{- if $v.security.apiKeysSecret }}
{{- $_ := set $security "api_key_files" (list "/etc/pdserve/api-keys/api-keys") }}
{{- end }}
{{- if $v.security.tlsSecret }}
{{- $_ := set $security "tls_cert" "/etc/pdserve/tls/tls.crt" }}
{{- $_ := set $security "tls_key" "/etc/pdserve/tls/tls.key" }}
{{- end }}
{{- if $v.security.internalTlsSecret }}
{{- $_ := set $security "internal_ca" "/etc/pdserve/internal-tls/ca.crt" }}
{{- $_ := set $security "internal_cert" "/etc/pdserve/internal-tls/tls.crt" }}
{{- $_ := set $security "internal_key" "/etc/pdserve/internal-tls/tls.key" }}
{{- end }}
{{- $admin := dict "host" "127.0.0.1" "port" 0 }}
{{- if $v.admin.enabled }}
{{- $admin = dict "host" "0.0.0.0" "port" ($v.admin.port | int) "token_file" "/etc/pdserve/admin/admin-token" }}
{{- end }}
{{- $own := dict
  "name" "pdserve"
  "state_dir" "/var/lib/pdserve/cluster"
  "model_cache" "/models/converted"
  "pools" $pools
  "cache" (dict "redis" $redis)
  "router" (dict "host" "0.0.0.0" "http_port" ($v.routerSpec.httpPort | int) "grpc_port" ($v.routerSpec.grpcPort | int))
  "admin" $admin
  "security" $security }}
{{- mergeOverwrite (deepCopy $v.config) $own | toYaml }}
{{- end }}
