{{- define "pdserve.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- /* One worker group: (dict "root" $ "role" "prefill" "group" <values>). */}}
{{- define "pdserve.workerGroup" -}}
{{- $root := .root }}
- groupName: {{ .role }}
  replicas: {{ .group.replicas }}
  minReplicas: {{ .group.minReplicas }}
  maxReplicas: {{ .group.maxReplicas }}
  rayStartParams:
    # A worker asks for one of its role: that is what places it here.
    resources: {{ printf "'{\"%s\": %d}'" .role (int .group.workersPerPod) | quote }}
    {{- include "pdserve.rayPorts" $root | nindent 4 }}
    {{- with .group.rayStartParams }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  template:
    metadata:
      labels:
        {{- include "pdserve.labels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .role }}
      {{- with merge (dict) .group.podAnnotations $root.Values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "pdserve.fullname" $root }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ max .group.terminationGracePeriodSeconds (add (include "pdserve.drainSeconds" $root) 30) }}
      {{- with .group.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "pdserve.podSecurity" $root | nindent 8 }}
        {{- include "pdserve.portRange" $root | nindent 8 }}
      {{- with include "pdserve.prefetch" $root }}
      initContainers:
        {{- . | trim | nindent 8 }}
      {{- end }}
      containers:
        - name: ray-worker
          image: {{ include "pdserve.image" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          env:
            {{- include "pdserve.rayEnv" $root | nindent 12 }}
            # After the hook Ray would wait once more for what could not move.
            - name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
              value: "5"
            {{- with .group.containerEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: node-manager, containerPort: 6380}
          {{- include "pdserve.rayProbes" $root | nindent 10 }}
          lifecycle:
            preStop:
              exec:
                # Its workers end what they write, or hand it over, and start on other pods.
                command: [pdserve, leave, --address, {{ include "pdserve.headAddress" $root }}, --within, {{ add (include "pdserve.drainSeconds" $root) 15 | quote }}]
          resources:
            {{- toYaml .group.resources | nindent 12 }}
          securityContext:
            {{- include "pdserve.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            {{- include "pdserve.mounts" $root | nindent 12 }}
      volumes:
        {{- include "pdserve.volumes" (dict "root" $root "shmSize" .group.shmSize) | nindent 8 }}
      topologySpreadConstraints:
        {{- if .group.topologySpreadConstraints }}
        {{- toYaml .group.topologySpreadConstraints | nindent 8 }}
        {{- else }}
        {{- include "pdserve.spread" (dict "root" $root "component" .role) | nindent 8 }}
        {{- end }}
      {{- include "pdserve.scheduling" .group | nindent 6 }}
{{- end }}
