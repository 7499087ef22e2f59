{{- define "pdserve.components" -}}
matchLabels:
  {{- include "pdserve.selector" .root | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [{{ join ", " .components }}]}
{{- end }}

{{- /* Each of the components may reach each on ranges of ports. */}}
{{- define "pdserve.meshPolicy" -}}
{{- $peers := include "pdserve.components" . }}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "pdserve.fullname" .root }}-{{ .name }}
  labels:
    {{- include "pdserve.labels" .root | nindent 4 }}
spec:
  podSelector:
    {{- $peers | nindent 4 }}
  policyTypes: [Ingress, Egress]
  ingress:
    - from:
        - podSelector:
            {{- $peers | nindent 12 }}
      ports:
        {{- range .ports }}
        - {protocol: TCP, port: {{ index . 0 }}, endPort: {{ index . 1 }}}
        {{- end }}
  egress:
    - to:
        - podSelector:
            {{- $peers | nindent 12 }}
      ports:
        {{- range .ports }}
        - {protocol: TCP, port: {{ index . 0 }}, endPort: {{ index . 1 }}}
        {{- end }}
{{- end }}

{{- /* Some may reach one: a policy for the one and a policy for those. */}}
{{- define "pdserve.onewayPolicy" -}}
{{- $to := include "pdserve.components" (dict "root" .root "components" (list .to)) }}
{{- $from := include "pdserve.components" (dict "root" .root "components" .from) }}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "pdserve.fullname" .root }}-{{ .name }}
  labels:
    {{- include "pdserve.labels" .root | nindent 4 }}
spec:
  podSelector:
    {{- $to | nindent 4 }}
  policyTypes: [Ingress]
  ingress:
    - from:
        - podSelector:
            {{- $from | nindent 12 }}
      ports:
        {{- range .ports }}
        - {protocol: TCP, port: {{ . }}}
        {{- end }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "pdserve.fullname" .root }}-to-{{ .name }}
  labels:
    {{- include "pdserve.labels" .root | nindent 4 }}
spec:
  podSelector:
    {{- $from | nindent 4 }}
  policyTypes: [Egress]
  egress:
    - to:
        - podSelector:
            {{- $to | nindent 12 }}
      ports:
        {{- range .ports }}
        - {protocol: TCP, port: {{ . }}}
        {{- end }}
{{- end }}
